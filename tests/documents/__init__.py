"""The commands of the documents that this project follows, in words of our own."""
