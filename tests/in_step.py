"Exit 1 unless sam_explained/ is what `nbdev_export` makes of nbs/, README.md what `make readme` makes of index.ipynb"
import subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent


def snapshot(): return {p.name: p.read_bytes() for p in (root / 'sam_explained').glob('*.py')}


before = snapshot()
subprocess.run([bin / 'nbdev_export'], cwd=root, check=True)
changed = sorted(n for n in before.keys() | snapshot().keys() if before.get(n) != snapshot().get(n))
if changed: sys.exit(f'sam_explained/ was out of step with nbs/: {", ".join(changed)} changed. Run `make export` and commit.')
sys.exit(subprocess.run([sys.executable, root / 'site/readme.py', '--check'], cwd=root).returncode)
