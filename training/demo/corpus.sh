#!/usr/bin/env bash
# Writes the World English Bible (public domain) as plain prose, one file a chapter, into the given folder.
# Needs Debian's packages diatheke and sword-text-web: the text comes from there, nothing is downloaded.
set -euo pipefail

out=${1:?usage: corpus.sh FOLDER}
module=engWEB2015eb
if ! command -v diatheke >/dev/null || ! diatheke -b system -k modulelist | grep "^$module " >/dev/null; then
    echo "corpus.sh: the World English Bible is missing; install it with: apt-get install sword-text-web diatheke" >&2
    exit 1
fi
mkdir -p "$out"
diatheke -b "$module" -o '' -f internal -k 'Genesis 1:1-Revelation 22:21' |
    python3 "$(dirname "$0")/corpus.py" "$out"
cat "$out"/*.txt | sha256sum | sed "s|-\$|all chapters of $out|"
