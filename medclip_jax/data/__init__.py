"""Host side: reading, datasets, simulation and synthesis of images."""
