"""Numbers as tables print them."""


def shows(value, printed):
    """Whether a value rounds to the printed number, whose trailing zeros before the point may be rounded too."""
    digits = printed.replace(",", "")
    whole, _, decimals = digits.partition(".")
    unit = 10.0 ** -len(decimals) if decimals else 10.0 ** (len(whole) - len(whole.rstrip("0") or "0"))
    return abs(value - float(digits)) <= 0.5000001 * unit
