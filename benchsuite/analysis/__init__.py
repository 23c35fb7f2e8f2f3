"""From the tidy table of runs to what a figure or a table prints. Works from files alone; imports
no torch."""
