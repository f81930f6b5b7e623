"""Numbers in units that people read, one convention for every page, table and line: counts in powers of 1000 (K, M, B,
T), bytes in powers of 1024 (KiB, MiB, GiB), times in their one or two largest units.
"""

import math


def human_count(number: float) -> str:
    """Return a count in K, M, B, T: 671.03e9 is `671.03B`; below ten thousand every digit: `8,192`."""
    return _human(number, 1000.0, ("", "K", "M", "B", "T"), plain_below=10_000)


def human_bytes(number: float) -> str:
    """Return bytes in binary units: 8192 is `8.00 KiB`, 2**31 is `2.00 GiB`."""
    return _human(number, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"), plain_below=1024)


def human_dollars(amount: float) -> str:
    """Return an amount of money: `$5.58M`, `$9,800`, `$0.42`."""
    return f"${human_count(round(amount))}" if amount >= 100 else f"${amount:.2g}"


def human_time(seconds: float) -> str:
    """Return a duration: `74 µs`, `12.3 ms`, `8.7 s`, `3 min 20 s`, `2 h 05 min`, `54 d 3 h`."""
    if not math.isfinite(seconds):
        return str(seconds)
    for unit, scale, below in (("µs", 1e6, 0.9995e-3), ("ms", 1e3, 0.9995)):
        if 0 < seconds < below:
            return f"{seconds * scale:.3g} {unit}"
    if seconds < 59.95:
        return f"{seconds:.3g} s" if 0 < seconds < 9.95 else f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86_400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86_400} d {total % 86_400 // 3600} h"


def _human(number: float, base: float, units: tuple[str, ...], plain_below: float) -> str:
    if not math.isfinite(number):
        return str(number)
    if abs(number) < plain_below:
        return f"{number:,.2f}".rstrip("0").rstrip(".") + units[0]
    power = 0
    # Rounding first keeps 999,999 from reading "1000.00K".
    while power < len(units) - 1 and round(abs(number) / base**power, 2) >= base:
        power += 1
    return f"{number / base**power:,.2f}{units[power]}"
