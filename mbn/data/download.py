"""Download a file with mirrors, resume and a checksum."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from mbn.system.errors import UserError

CHUNK = 1 << 20


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(addresses: list[str], path: Path, checksum: str, timeout: float = 30) -> None:
    """Fetch path from the first of the addresses that gives a file with this MD5.

    An interrupted download stays in `path.part` and is continued, from the same address or the next. A complete file
    with another checksum is thrown away. Errors: UserError when no address gave the file, saying why for each.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for address in addresses:
        try:
            _fetch(address, part, timeout)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            failures.append(f"{address} ({reason})")
            continue
        if md5(part) == checksum:
            part.replace(path)
            return
        part.unlink()
        failures.append(f"{address} (the file's MD5 is not {checksum})")
    raise UserError("; ".join(failures))


def _fetch(address: str, part: Path, timeout: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left to fetch: the checksum decides
            return
        raise
    with response:
        if have and response.status != 206:
            have = 0  # the server sends all of it again
        left = response.headers.get("Content-Length")
        total = have + int(left) if left else None
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size < total:
            raise OSError("the connection ended early")
