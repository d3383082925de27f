"""What the service speaks of: jobs, reports, the catalogue of methods, errors. Pure: no database, no HTTP, no torch."""
