"""What the laws stand on: cells to show them on, ranks to run them with, broken twins and serial
references."""
