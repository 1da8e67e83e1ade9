"""``tinytron quickstart``: what happens before the training (``prepare``) and after it (``report``)."""
