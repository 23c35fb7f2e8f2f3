"""The question: cells, the plans that list them, and the files of members that they name. Imports
no torch."""
