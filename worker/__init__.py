"""The data plane: what needs torch. It never imports fastapi, service.api or service.app."""
