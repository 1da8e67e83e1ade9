"""The parts of a run that are about its folder: where it is, what it goes on from, what is reported and saved."""
