"""Running what a plan lacks, and the Python face of the suite."""
