"""Evidence that can be checked years later, offline, without this service: certificates, signing keys, the audit chain."""
