"""Reports: one self-contained HTML page with charts, the same tables in the terminal, files."""
