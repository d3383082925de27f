"""Which of the media types on offer a client wants (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """The offer of the highest quality, the earlier one in a tie; None: the client takes none of them.

    >>> preferred("text/html,application/xhtml+xml,*/*;q=0.8", ["application/json", "text/html"])
    'text/html'
    >>> preferred("*/*", ["application/json", "text/html"])
    'application/json'
    >>> preferred("application/pdf", ["application/json", "text/html"]) is None
    True
    """
    wanted = dict(_parse(item) for item in accept.split(",") if item.strip()) or {"*/*": 1.0}
    quality = {
        offer: next((wanted[name] for name in (offer, f"{offer.split('/')[0]}/*", "*/*") if name in wanted), 0.0)
        for offer in offers
    }
    best = max(offers, key=lambda offer: quality[offer])
    return best if quality[best] > 0 else None


def _parse(item: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in item.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                return name, 0.0
    return name, 1.0
