"""HTTP routes, one noun per file. They translate; what happens is in `gateway.perform` and the platform."""
