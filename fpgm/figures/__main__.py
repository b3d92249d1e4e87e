from fpgm.figures.command import main

main()
