"""Weight pushes that are struck, and who judges what was served meanwhile (docs/chaos.md)."""
