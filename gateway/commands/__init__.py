"""The `zimage` command, one subcommand per file, and what they share. No command knows torch."""
