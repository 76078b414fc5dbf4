"""What the doctor says, as text for the terminal, JSON, SARIF and an HTML page."""
