"""Running jobs elsewhere: by SSH on a machine, or by SLURM on a cluster. Nothing here imports torch."""
