"""Meters: step windows, wire bytes, memory, device time, load, environment, heart beats."""
