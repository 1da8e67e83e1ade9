"""Floor 1: operations that torch has, but slower than its own parts allow; each with what it was measured against."""
