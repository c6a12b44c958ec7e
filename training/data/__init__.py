"""Read and check data sets of images, bags and series."""
