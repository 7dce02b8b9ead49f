"""All weights of networks of five to twenty-three million parameters."""
