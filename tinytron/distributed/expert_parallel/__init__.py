"""Expert parallelism: tokens travel to the rank that holds their experts, and back."""
