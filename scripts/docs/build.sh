#!/usr/bin/env bash
# The documentation as a site: pages from docs/, search, and the Python API.
#
#   bash scripts/docs/build.sh                 writes build/site: open index.html there (search needs a server)
#   bash scripts/docs/build.sh serve           the same at http://127.0.0.1:8000, built again as pages change
#
# Mermaid, which draws the pictures in the reader's browser, is fetched once with npm or curl and then part of the site. Without
# the network the site is built all the same, and a browser loads Mermaid from unpkg.com. Nothing else uses the network.
set -euo pipefail
source "$(dirname "$0")/../lib/env.sh"
need_python docs torch mkdocs material mkdocstrings_handlers

MERMAID=11.17.2
SHA256=7a644017d37f93c8359790884e6b67fb1f747c78eb20475952404bd87190a3f8
target=docs/assets/mermaid.min.js

_matches() { [ -f "$1" ] && echo "$SHA256  $1" | sha256sum --check --status; }

_fetch() { # into $target; fails without the network
    local folder
    folder="$(mktemp -d)"
    if command -v npm >/dev/null 2>&1; then
        (cd "$folder" && npm pack --silent "@mermaid-js/tiny@$MERMAID" >/dev/null && tar -xzf ./*.tgz)
    else
        curl -fsSL "https://registry.npmjs.org/@mermaid-js/tiny/-/tiny-$MERMAID.tgz" | tar -xz -C "$folder"
    fi || return 1
    _matches "$folder/package/dist/mermaid.tiny.js" || return 1
    mv "$folder/package/dist/mermaid.tiny.js" "$target"
    rm -rf "$folder"
}

if ! _matches "$target" && ! _fetch; then
    echo "Mermaid $MERMAID could not be fetched: browsers will load it from unpkg.com to draw the pictures" >&2
fi
export NO_MKDOCS_2_WARNING=1 # an advertisement of the theme's authors
case "${1:-build}" in
    build) exec "$PYTHON" -m mkdocs build --strict ;;
    *) exec "$PYTHON" -m mkdocs "$@" ;;
esac
