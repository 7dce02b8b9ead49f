"""Where the data of tasks come from: files found or downloaded, how they are read, and how they are shifted."""
