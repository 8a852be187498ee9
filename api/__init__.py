"""The HTTP API: /predict for a few prompts at once, /jobs for long lists. Imports no torch."""
