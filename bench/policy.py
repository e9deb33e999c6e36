"""`python bench/policy.py [COUNT…]`: what `meshbench.decisions` measures, as a table."""

from __future__ import annotations

import sys

from meshbench import decisions


def main() -> None:
    print("| policies | p50 | p99 | allowed | compiled | one change | memory |")
    print("|---|---|---|---|---|---|---|")
    for count in [int(text) for text in sys.argv[1:]] or decisions.COUNTS:
        found = decisions.measure(count)
        print(
            f"| {count:,} | {found['p50_us']:.1f} µs | {found['p99_us']:.1f} µs | "
            f"{found['allowed_percent']:.0f}% | {found['compiled_ms']:,.0f} ms | "
            f"{found['change_ms']:.2f} ms | {found['bytes_each'] * count / 2**20:,.1f} MiB |"
        )


if __name__ == "__main__":
    main()
