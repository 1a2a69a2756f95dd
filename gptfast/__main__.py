from gptfast.cli import main

main()
