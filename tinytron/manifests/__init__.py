"""Manifests for clusters that run containers: pure functions from the description of a job to JobSet, TrainJob, Volcano."""
