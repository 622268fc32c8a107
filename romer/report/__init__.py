"""What the paper shows, regenerated from long-format rows: tables beside the published numbers, and figures."""
