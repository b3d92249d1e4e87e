from fpgm.structure.command import main

main()
