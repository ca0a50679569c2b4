"""How images are fitted to the size that a detector reads: arithmetic alone, without torch."""

Size = tuple[int, int]
"""Height x width in pixels."""


def content_size(native: Size, size: Size, keep_aspect: bool) -> Size:
    """Height x width that an image takes up within `size`, in pixels.

    Example:
        >>> content_size((100, 200), (256, 256), keep_aspect=True)
        (128, 256)
    """
    if not keep_aspect:
        return size
    scale = min(size[0] / native[0], size[1] / native[1])
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))
