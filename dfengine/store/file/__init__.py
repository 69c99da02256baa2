"""One HDF5 file: its schema, its SWMR writer and its reader."""
