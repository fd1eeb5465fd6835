#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Draws row `plans` of `scale --json` as an SVG: seconds over chunks, both axes logarithmic.

    build/release/bin/scale --row plans --json | benchmarks/plot_scale.py > docs/scale.svg
"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 420, 60, 40, 20, 20


def main() -> None:
    points = []
    for line in sys.stdin:
        row = json.loads(line)
        if row["row"] == "plans":
            ranks, tensors = map(int, row["case"].split("x"))
            points.append((ranks * tensors, row["seconds"]["total"]))
    points.sort()
    low_x, high_x = math.floor(math.log10(points[0][0])), math.ceil(math.log10(points[-1][0]))
    seconds = [s for _, s in points]
    low_y, high_y = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))

    def x(chunks: float) -> float:
        return LEFT + (math.log10(chunks) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - low_y) / (high_y - low_y) * (HEIGHT - BOTTOM - TOP)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for e in range(low_x, high_x + 1):
        out.append(f'<path d="M{x(10**e):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>'
                   f'<text x="{x(10**e):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{10**e:,}</text>')
    for e in range(low_y, high_y + 1):
        out.append(f'<path d="M{LEFT} {y(10**e):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 6}" y="{y(10**e) + 4:.1f}" text-anchor="end">{10**e:g} s</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">chunks (ranks x 1,000 tensors)</text>')
    # What linear growth from the first point would be.
    first, last = points[0], points[-1]
    linear = first[1] * last[0] / first[0]
    out.append(f'<path d="M{x(first[0]):.1f} {y(first[1]):.1f}L{x(last[0]):.1f} {y(linear):.1f}" '
               'stroke="#999" stroke-dasharray="4 4"/>')
    path = "L".join(f"{x(c):.1f} {y(s):.1f}" for c, s in points)
    out.append(f'<path d="M{path}" fill="none" stroke="#1f77b4" stroke-width="2"/>')
    for c, s in points:
        out.append(f'<circle cx="{x(c):.1f}" cy="{y(s):.1f}" r="3" fill="#1f77b4"/>')
    out.append("</svg>")
    print("\n".join(out))


if __name__ == "__main__":
    main()
