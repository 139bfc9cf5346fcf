#!/usr/bin/env bash
# Makes Go code from the protos and runs client.go with it: client_go.sh PROTO_FOLDER ADDRESS. Needs what `install.sh FOLDER go`
# has installed.
set -euo pipefail

protos=$1 address=$2
here=$(cd "$(dirname "$0")" && pwd)
tools=$(cd "$here/../../.tools" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export GOROOT="$tools/go/go" GO111MODULE=off CGO_ENABLED=0 GOCACHE="$tools/go/cache"
export GOPATH="$work:$tools/go/usr/share/gocode"
export PATH="$tools/go/usr/bin:$tools/bin:$GOROOT/bin:$PATH"
cat >"$work/buf.gen.yaml" <<YAML
version: v1
managed: {enabled: true, go_package_prefix: {default: denoised}}
plugins:
  - {plugin: go, out: $work/src, opt: paths=source_relative}
  - {plugin: go-grpc, out: $work/src, opt: paths=source_relative}
YAML
buf generate "$protos" --template "$work/buf.gen.yaml"
mkdir -p "$work/src/client"
cp "$here/client.go" "$work/src/client/main.go"
cd "$work/src/client"
go run . "$address"
