"""What every command needs from the machine: safe writes, progress, provenance, device and precision."""
