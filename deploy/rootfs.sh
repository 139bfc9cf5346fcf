#!/usr/bin/env bash
# Lays out what an image holds beside its base: server, ONNX Runtime, licences and a user. Containerfile does this, and the
# tests, which then run it with the libraries of this machine in place of a base.
#   deploy/rootfs.sh BINARY ORT_FOLDER OUT [--with-base]
set -euo pipefail

binary=${1:?usage: rootfs.sh BINARY ORT_FOLDER OUT [--with-base]}
runtime=${2:?}
out=${3:?}
source=$(cd "$(dirname "$0")/.." && pwd)

mkdir -p "$out"/{etc,tmp,usr/bin,usr/lib/denoised,usr/share/doc/denoised}
# Symbols of functions stay, for traces; lines, which are most of it, go.
install -m 755 "$binary" "$out/usr/bin/denoised"
strip --strip-debug "$out/usr/bin/denoised"
# A folder with the library, or the library itself.
if [[ -d $runtime ]]; then
    cp --dereference "$runtime/libonnxruntime.so" "$out/usr/lib/denoised/"
    # Providers of devices lie beside it, where there are any.
    find "$runtime" -name 'libonnxruntime_providers_*.so' -exec cp {} "$out/usr/lib/denoised/" \;
    find "$runtime" -maxdepth 1 -type f ! -name '*.so*' -exec cp {} "$out/usr/share/doc/denoised/" \;
else
    cp --dereference "$runtime" "$out/usr/lib/denoised/libonnxruntime.so"
fi
cp "$source"/LICENSE-{MIT,APACHE} "$out/usr/share/doc/denoised/"

if [[ ${4:-} == --with-base ]]; then
    echo 'denoised:x:65532:65532::/:/usr/sbin/nologin' >"$out/etc/passwd"
    # All libraries that the two need, where they expect them.
    ldd "$out/usr/bin/denoised" "$out/usr/lib/denoised/libonnxruntime.so" |
        sed -nE 's/^[[:space:]]+(.* => )?(\/[^ ]+) \(0x.*/\2/p' | sort -u |
        while read -r library; do
            install -D "$library" "$out$library"
        done
fi
