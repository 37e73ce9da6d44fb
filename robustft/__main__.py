from robustft.cli import main

raise SystemExit(main())
