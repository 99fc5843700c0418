"""What an evaluation leaves on the disk, and how processes share it."""
