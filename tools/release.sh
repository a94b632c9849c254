#!/usr/bin/env bash
# tools/release.sh REPOSITORY: what a release consists of, in dist/, checked. It ends before the upload.
#
# REPOSITORY is the address that the package index shows, such as https://github.com/OWNER/asyppo; the links of the readme
# lead to its tag v<version>. PYTHON is one that has build and twine: pip install build twine.
set -euo pipefail
cd "$(dirname "$0")/.."
export ASYPPO_REPOSITORY=${1:?"REPOSITORY: needs an address such as https://github.com/OWNER/asyppo"}
python=${PYTHON:-python3}

version=$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' kernels/asyppo_kernels/__init__.py)
grep -q "^## $version" CHANGELOG.md || { echo "CHANGELOG.md: has no section $version"; exit 1; }
[ -z "$(git status --porcelain)" ] || { echo "the work tree has changes; commit them first"; exit 1; }
if git rev-parse --quiet --verify "refs/tags/v$version" >/dev/null; then
  [ "$(git rev-parse "v$version^{commit}")" = "$(git rev-parse HEAD)" ] || { echo "v$version is the tag of another commit"; exit 1; }
fi

rm -rf dist
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*
"$python" tools/hub_kernels.py "dist/hub-kernels-$version"
cat <<END
asyppo $version is in dist/. What is left to do by hand:
  git tag v$version && git push origin v$version
  $python -m twine upload dist/*.whl dist/*.tar.gz
  hf upload OWNER/asyppo-kernels dist/hub-kernels-$version
END
