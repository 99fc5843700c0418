"""What to do with every projection, decided before anything is written, with exact bytes."""
