"""The pixels of an image in the order of a direction of `cross_scan`, one by one."""


def path(direction: str, height: int, width: int) -> list[tuple[int, int]]:
    """(row, column) of each step, found by sorting: first by window, then within it."""
    order = direction.removesuffix("_reversed")
    window = int(order.removeprefix("window").split("_")[0]) if "window" in order else max(height, width)
    pixels = [(i, j) for i in range(height) for j in range(width)]

    def key(pixel: tuple[int, int]) -> tuple[int, ...]:
        i, j = pixel[::-1] if order.endswith("column") else pixel
        return i // window, j // window, i, j

    pixels.sort(key=key)
    return pixels[::-1] if direction.endswith("_reversed") else pixels
