"""Pictures: hostile bytes → clean RGB (`decode`), RGB → exact size (`fit`), RGB → files (`encode`).
Pillow and numpy only; knows no HTTP and no models."""
