"""What a file is that holds no weights: people's downloads go wrong in a few well-known ways."""

import re

_TAIL = "download the weights themselves"

# The first bytes of common formats, and what the file is.
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file, such as a WebP image",
    b"BM": "a BMP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive; unpack it and name a file inside",
    b"BZh": "a bzip2 archive; unpack it and name a file inside",
    b"\xfd7zXZ": "an xz archive; unpack it and name a file inside",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it and name a file inside",
    b"7z\xbc\xaf": "a 7-zip archive; unpack it and name a file inside",
    b"\x89HDF": "an HDF5 file, such as Keras writes, of which no family of weights is read",
    b"\x93NUMPY": "a single NumPy array (.npy), of which no family of weights is read",
    b"GGUF": "a GGUF file, of which no family of weights is read",
    b"PAR1": "a Parquet file, which holds data and no weights",
}


def describe(head: bytes) -> str | None:
    """What a file is that begins with these 4 KiB, and what to do; None if unknown."""
    for start, what in _STARTS.items():
        if head.startswith(start):
            return what if ";" in what or "," in what else f"{what}, not weights; {_TAIL}"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name a file inside"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if (
            error.start < len(head) - 4 or not head[: error.start]
        ):  # else a cut character at the end
            return None
        text = head[: error.start].decode()
    if any(ord(letter) < 32 and letter not in "\t\n\r\f\x1b" for letter in text):
        return None
    return _describe_text(text.lstrip("\ufeff \t\r\n"))


def _describe_text(text: str) -> str:
    lower = text.lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")):
        return f"an HTML page, not weights; {_TAIL}, whose address is behind the page's link"
    if lower.startswith(("<?xml", "<error", "<!doctype")):
        code = re.search(r"<Code>\s*(\w{1,60})\s*</Code>", text)
        said = f" ({code[1]})" if code else ""
        return f"an XML answer of a server{said}, not weights; look for them at another address"
    if re.match(r"--\d{4}-\d\d-\d\d \d\d:\d\d:\d\d--  |wget: |Resolving \S+", text):
        return "the log of a download with `wget -o`, not weights; use `wget -O` (capital) instead"
    if lower.startswith(("{", "[")):
        return f"JSON text, not weights; {_TAIL}"
    return f"text, not weights; {_TAIL}"
