"""Programs around the suite: what a machine can do, what the suite itself costs, calibration,
checks on a GPU, asv."""
