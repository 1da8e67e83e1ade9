"""The parts of a run that concern its folder: where it is, what the run continues from, what is reported and saved."""
