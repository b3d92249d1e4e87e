"""The machine: device, precision, cores, memory, and the processes of one run."""
