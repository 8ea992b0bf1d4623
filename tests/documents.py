"""PDF files for the tests: pypdf reads them, and does not write text."""

from __future__ import annotations

from pathlib import Path

import pypdf


def make_pdf(path: Path, *pages: str) -> None:
    """Write the smallest PDF with these texts, one for each page; an empty text makes a page without any."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b"0 0 10 10 re f"
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * i),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        ]
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1,
        table,
        len(objects) + 1,
        len(out),
    )
    path.write_bytes(out)


def compress(source: Path, target: Path) -> None:
    """Write ``source`` with compressed texts."""
    writer = pypdf.PdfWriter(source)
    for page in writer.pages:
        page.compress_content_streams()
    writer.write(target)


def encrypt(source: Path, target: Path, user: str, algorithm: str) -> None:
    """Write ``source`` encrypted; an empty ``user`` password lets everybody read it."""
    writer = pypdf.PdfWriter(source)
    writer.encrypt(user, "owner", algorithm=algorithm)
    writer.write(target)
