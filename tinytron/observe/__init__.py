"""Looking at runs: a live page, a report in one file, pictures and a table, all made from the files of run folders.

Nothing here imports torch, so the commands start at once and need no training machine."""
